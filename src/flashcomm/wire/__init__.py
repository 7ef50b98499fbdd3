"""The bytes on the wire: their formats and layout (`format`), and the definition of every bit (`torch_codec`)."""
