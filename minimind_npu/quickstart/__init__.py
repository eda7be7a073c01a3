"""The smallest run: see quickstart.py. (A package, so that `quickstart` means this folder also
where the script of that name runs.)"""
