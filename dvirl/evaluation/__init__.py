"""The judgement: decoding measured, one question at a time."""
