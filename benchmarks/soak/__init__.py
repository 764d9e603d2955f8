"""Hours of a mixed load below capacity: what grows, what is lost, what slows down."""
