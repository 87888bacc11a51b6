"""The ops: ``<op>.py`` has the definition, the schema and the native kernels, ``<op>_triton.py`` the Triton kernels."""
