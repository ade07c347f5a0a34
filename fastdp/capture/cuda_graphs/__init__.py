"""Records captured steps as CUDA graphs and replays them."""
