"""What any run stands on: processes, files that are whole or absent, random keys, captured graphs, commands."""
