"""What a value is on the wire: the grammar and layout (`format`) and the definition of every bit (`torch_codec`)."""
