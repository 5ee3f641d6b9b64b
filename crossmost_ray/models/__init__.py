"""The two towers, the text tower, and the classifier that they share."""
