"""A bundle's figures and its policies' pictures as one self-contained page: `gather` measures, `page` renders."""
