"""What is known of other libraries, and of nobody else in this package."""
