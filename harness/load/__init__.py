"""Load: the only code that holds a stopwatch. client.py times one request, arrivals.py decides when the next begins,
workload.py what it asks for, dialect.py what this server understands, truth.py is the server whose delays are known.
"""
