"""Train a spiking VGG-11 on the event-camera data sets DVS-Gesture or DVS-CIFAR10, as in the paper.

python examples/dvs/train.py --config examples/dvs/dvs_gesture.yaml                    SLTT
python examples/dvs/train.py --config examples/dvs/dvs_gesture.yaml --method sltt-k    SLTT-4, as published
python examples/dvs/train.py --config examples/dvs/dvs_gesture.yaml --method bptt      BPTT
python examples/dvs/train.py --config examples/dvs/dvs_gesture.yaml --smoke            a tiny set, to see it run
"""

from sltt_ext.experiment import main

if __name__ == "__main__":
    main(__doc__)
