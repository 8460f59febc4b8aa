"""Which concepts a sample's tracks carry: sparse bags of the identities of tracks, of their births and deaths.

A concept is a chain of linked latents, whatever layer they are of. Which latent belongs to which chain hangs on the
suite alone, so that a column means the same in every run with it.
"""

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from jaxsae.tracking.profiles import owners
from jaxsae.tracking.tracks import Tracks

THIRDS = ("early", "middle", "late")
CONCEPT_EVENTS = ("active", *(f"{event}_{third}" for event in ("born", "died") for third in THIRDS))


def concept_bags(tracks: Tracks, concepts: Int[np.ndarray, "L F"]) -> sp.csr_matrix:
    """Return for each of N samples what happened to each of C concepts, [N, 7 C].

    Column e C + c holds event e of `CONCEPT_EVENTS` of concept c: "active" the largest activation that a track had in
    it; "born_early" and so on 1 if a track was born in it, or ended in it, in that third of the layers. A track alive
    at the end does not end.

    Args:
        concepts: the number of each latent's chain, from 0; C is one more than the largest.
    """
    n_concepts, n_layers = int(concepts.max(initial=-1)) + 1, tracks.n_layers
    of_track, of_observation = owners(tracks)
    of_latent = concepts[tracks.layer, tracks.feature_id]
    first, last = tracks.observation_offsets[:-1], tracks.observation_offsets[1:] - 1
    ended = np.flatnonzero(tracks.death >= 0)
    rows = [of_observation, of_track, of_track[ended]]
    columns = [
        of_latent,
        _column(1 + _third(tracks.birth, n_layers), of_latent[first], n_concepts),
        _column(4 + _third(tracks.death[ended], n_layers), of_latent[last[ended]], n_concepts),
    ]
    entries = [tracks.activation, np.ones(len(of_track)), np.ones(len(ended))]
    shape = tracks.n_samples, len(CONCEPT_EVENTS) * n_concepts
    return _largest(np.concatenate(rows), np.concatenate(columns), np.concatenate(entries), shape)


def _third(layers: Int[np.ndarray, " X"], n_layers: int) -> Int[np.ndarray, " X"]:
    return 3 * layers // n_layers


def _column(event: Int[np.ndarray, " X"], concept: Int[np.ndarray, " X"], n_concepts: int) -> Int[np.ndarray, " X"]:
    return event * n_concepts + concept


def _largest(
    rows: Int[np.ndarray, " X"],
    columns: Int[np.ndarray, " X"],
    entries: Float[np.ndarray, " X"],
    shape: tuple[int, int],
) -> sp.csr_matrix:
    """Return the matrix of the largest entry at each place."""
    order = np.lexsort((entries, columns, rows))
    rows, columns, entries = rows[order], columns[order], entries[order]
    is_last = np.ones(len(rows), bool)
    is_last[:-1] = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
    return sp.csr_matrix((entries[is_last], (rows[is_last], columns[is_last])), shape=shape)
