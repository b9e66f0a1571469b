"""Write curated data in other tools' formats, and models that run without this package."""
