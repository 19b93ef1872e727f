"""The stages of a reproduction, in the order in which they run. Each is one file with a class that has

    run(lab)          measures and stores what is not there yet
    tables(report)    Markdown from what is stored, without a model
"""
