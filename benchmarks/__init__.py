"""What agentstate costs, beside what the same work costs without it, measured in one run.

python -m benchmarks [--quick] [--only NAME]... [--output FOLDER] [--publish]
"""
