"""Where the parts of sharded tensors lie, and how sums go over the processes that share them."""
