"""What a run will take on machines that are not here: time, memory, disk and cost of every stage, on paper."""
