"""One file per architecture; weight loading."""
