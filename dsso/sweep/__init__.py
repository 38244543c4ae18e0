"""Many runs from one recipe: a grid or random draws of settings, what came of each, and tables of them."""
