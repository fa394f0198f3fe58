"""What samples come as that is no line of JSON, and how it becomes one: files of other formats, and typed values."""
