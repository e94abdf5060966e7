"""The person detector of Step 6: Cascade R-CNN, ResNeXt-101-64x4d, FPN, trained on COCO (class 0 is
the person).

It is mmdetection's own config of that model; only the ImageNet weights are left out, since the
checkpoint replaces them. Any other mmdetection config may be given to fetch_proposal.py in its
place.
"""

_base_ = 'mmdet::cascade_rcnn/cascade-rcnn_x101-64x4d_fpn_1x_coco.py'

model = dict(backbone=dict(init_cfg=None))
