"""The backends: one file each, none of which knows a dtype, a framework or another backend."""
