"""OpenAI's schema: request bodies, response objects and errors."""
