"""Digital patients: one 3-D mineral map gives the CT and the DXA, so the truth is known exactly.

Parameters are drawn (`patient.draw`) apart from being rendered (`render.render`), so any image can be
replayed from its seed and settings. Nothing here was fitted to a real scan; figures marked "approximation" are ours.
"""
