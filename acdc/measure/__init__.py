"""How good a circuit is: metric and faithfulness, curves over sizes, error nodes."""
