"""The paper's figures and tables, one folder each. Nothing imports this package but itself and its tests."""
