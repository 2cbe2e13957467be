"""`hpcgpt report`: runs as one HTML page without scripts, for a browser, a mail or a printer. It only reads, and
imports no torch.
"""
