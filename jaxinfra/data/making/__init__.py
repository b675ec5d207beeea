"""How a store is made: jobs on engines, parts that outlive a kill, arrays in the order of the source."""
