"""The theory as tools: what an automaton needs, weights that run it exactly, and what a trained model can never do."""
