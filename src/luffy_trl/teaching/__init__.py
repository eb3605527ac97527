"""Demonstrations by stronger models: problems with gold answers in, verified demonstrations out.

problems -> answers of each teacher, kept as they come -> texts as the policy should write them -> graded by the
rewards -> selected -> the data contract, with a card and a list of what was rejected
"""
