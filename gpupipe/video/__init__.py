"""Files to tensors and tensors to files.

    decode.py     images → tensors
    frames.py     a video → tensors, any frame by its number
    encode.py     tensors → a video with sound
    images.py     tensors → numbered images
    sound.py      a sound file → samples for speech, or a video's sound track
    join.py       videos of a clip's parts → one video

What encode.py is made of:

    ways.py       where and by how many encoders a video is encoded: chosen once
    codecs.py     which FFmpeg encoder stands behind a name, and how it is set up
    segments.py   encoders side by side on segments of a clip, fed from memory
    cuda.py       encoders that are fed on the GPU: NVENC and nvJPEG
"""
