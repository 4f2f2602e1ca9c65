"""With this folder in PYTHONPATH an elastic training waits for the workers that it asks for.

Without that the run might be over before Slurm has started the job that lends them.
"""

import os
import time

if "HVD_LBT_ELASTIC" in os.environ:  # a worker
    from hvd_lbt import comm
    from hvd_lbt.elastic import worker as elastic

    commit = elastic.Membership.commit

    def patient_commit(self, state, following):
        commit(self, state, following)
        while self._target > comm.horovod().size() and not self._wanted["regroup"]:
            time.sleep(0.05)

    elastic.Membership.commit = patient_commit
