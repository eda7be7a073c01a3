"""Visible devices; nothing in this process may touch an NPU before, so that every case is a fork with its own list."""

import os

import torch


def count(visible):
    """torch.npu.device_count() with ASCEND_RT_VISIBLE_DEVICES=visible, of four cards."""
    child = os.fork()
    if child == 0:
        os.environ["ASCEND_RT_VISIBLE_DEVICES"] = visible
        os._exit(torch.npu.device_count())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check_visible_devices():
    cases = {
        "0,1,2,3": 4,
        "1,3": 2,
        "2": 1,
        "": 0,
        "3,1": 1,
        "0,0": 1,
        "1,4": 1,
        "4": 0,
        "0,x,2": 1,
        "-1": 0,
    }
    assert {visible: count(visible) for visible in cases} == cases
    assert torch.npu.device_count() == 4 and torch.npu.is_available()
