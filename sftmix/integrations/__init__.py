"""The method in the trainers of other libraries."""
