"""What leaves the pipeline: curated data in others' formats, and models that run without this package."""
