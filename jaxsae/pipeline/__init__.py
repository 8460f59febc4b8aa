"""The stages of a run: what each reads and writes, in which order, and the wiring between the folders.

In: a config and a workdir. Out: the workdir's files. Not here: any mathematics; a stage calls the folder that has it.
"""
