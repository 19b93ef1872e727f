"""OpenAI's fine-tuning API: uploaded files, and training jobs in processes of their own."""
