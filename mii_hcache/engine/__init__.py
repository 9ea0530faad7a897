"""The engines behind the runtime's ports. The only room that imports deepspeed, mii or transformers."""
