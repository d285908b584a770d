"""A server of answers with early exits, over the interface of OpenAI's: requests join and leave a running batch."""
