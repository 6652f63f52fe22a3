"""Writers of artifacts: one public function each, from a checkpoint and quantized tensors to files."""
