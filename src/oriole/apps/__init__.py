"""What a person uses: the Python API, chat, answering a file, evaluation, reports. Needs no trainer."""
