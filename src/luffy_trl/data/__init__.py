"""From a dataset as it is published to one with a prompt, demonstrations and a gold answer in each row."""
