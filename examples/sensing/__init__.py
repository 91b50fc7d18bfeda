"""What examples/matrix_sensing.py is made of."""
