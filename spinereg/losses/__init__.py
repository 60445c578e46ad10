"""What a registration minimises: similarities, penalties on tissue and bone, and the sum of them."""
