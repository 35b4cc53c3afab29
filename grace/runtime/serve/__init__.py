"""`grace serve`: an OpenAI-compatible server over the engine.

request -> schema -> prompts (pictures, tokens) -> scheduler (rows of one decoder) -> answers (JSON or events)
"""
