"""Which of several replicas serves a request."""
