"""``skerry-agent doctor``: what a person on the device wants to know, one line per check, with advice where it is not well.

It only looks: nothing is repaired, moved or written but one unnamed temporary file. It asks a running agent where there is one,
and reads the files of the state folder where there is none.
"""
