"""What octavo's actors say to each other: messages, ids and public errors; no behaviour."""
