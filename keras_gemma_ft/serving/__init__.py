"""An endpoint that speaks OpenAI's HTTP API: requests, their turn, replies."""
