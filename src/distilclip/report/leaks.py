"""Make the section about copies of evaluation pictures in the data: each beside the row of the store nearest to it."""

from __future__ import annotations

import numpy as np

from distilclip.report.gallery import PictureReader, Strip, spread_evenly
from distilclip.report.load import Results
from distilclip.report.sections import GallerySize, Section, Strips, open_store, read_or_explain
from distilclip.scoring.near_tables import NearPictures, read_near
from distilclip.stage_folder import StageRecord


def copy_sections(results: Results, size: GallerySize) -> list[Section]:
    """Return a section for every finished folder of `select` that was asked for copies of pictures of its targets."""
    found = []
    for record in results.finished("select"):
        if "targets" in record.result:
            strips, problem = read_or_explain(_copy_strips, record, results, size)
            found.append(Section(record=record, chart=None, strips=strips, problem=problem))
    return found


def _copy_strips(record: StageRecord, results: Results, size: GallerySize) -> Strips:
    """Pairs of each target, from the most alike to the least, by a heading that names the target."""
    reader = PictureReader(open_store(record, results), size=size.thumbnail)
    found = {}
    for number, target in enumerate(record.result["targets"]):
        near = read_near(record.path, number)
        order = np.lexsort((near.picture, -near.similarity))
        shown = order[spread_evenly(len(order), 2 * size.num_groups)]
        heading = f"{target['name']}: a picture of it, and the nearest one in the data"
        found[heading] = [_pair(reader, near, row) for row in shown.tolist()]
    reader.close()
    return found


def _pair(reader: PictureReader, near: NearPictures, at: int) -> Strip:
    uri, key = near.uri[at], near.key[at]
    place = f"{uri}: {key}" if key else uri
    wanted = reader.picture_at(uri, key=key, offset=int(near.offset[at]), size=int(near.size[at]), place=place)
    nearest, similarity = int(near.nearest[at]), float(near.similarity[at])
    return Strip(samples=[nearest], distance=[None, similarity], pictures=(wanted, reader.picture(nearest)))
