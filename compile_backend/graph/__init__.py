"""Reading a traced graph: its matrix products, the roles of their operands, and the ends of operations."""
