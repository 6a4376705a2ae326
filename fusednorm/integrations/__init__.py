"""What other libraries call to compute with this one."""
