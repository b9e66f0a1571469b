"""Write one self-contained HTML page from the folders of other stages."""

from __future__ import annotations

from typing import Any

from distilclip import files, stage_folder
from distilclip.configs.report import Config
from distilclip.messages import warn
from distilclip.report.load import load
from distilclip.sets.published import published_rows

LARGE = 15_000_000  # bytes of a page


def main(config: Config) -> dict[str, Any]:
    """Write the page and return the folder's result.

    A finished page is left as it is. Raises `InputError` where the results it was made from have changed since.
    """
    from distilclip.report.embedding_map import write_map
    from distilclip.report.page import build  # needs the extra `report`, which Config has asked for
    from distilclip.report.sections import GallerySize

    folder = stage_folder.open_folder(config.out, stage="report", config=config)
    results = load(config.folders)
    sources = {record.path: stage_folder.result_digest(record.path) for record in results.folders if record.result}
    if folder.finished:
        stage_folder.check_made_from(config.out, folder.result()["sources"], sources)
        return folder.result()
    size = GallerySize(
        num_groups=config.num_groups,
        num_clusters=config.num_clusters,
        num_pictures=config.num_pictures,
        thumbnail=config.thumbnail_size,
        num_pages=config.num_pages,
        seed=config.seed,
    )
    page = build(
        results,
        heading=config.title,
        size=size,
        published=published_rows(config.published),
        map_size=_map_size(config),
    )
    if page.map is not None:
        write_map(folder.child("map.parquet"), page.map)
    for name, svg in page.figures.items():
        files.write_bytes(folder.child("figures", name), svg.encode())
    content = page.html.encode()
    if len(content) > LARGE:
        warn(
            f"report: the page has {len(content) / 1e6:.0f} MB, and browsers open it slowly. Fewer --num-pages, fewer "
            "--num-mapped or a smaller --thumbnail-size make it smaller; each needs another --out."
        )
    files.write_bytes(folder.child("index.html"), content)
    return folder.finish(
        {
            "page": "index.html",
            "figures": sorted(page.figures),
            "absent": [section for section, _ in page.absent],
            "map": None if page.map is None else {"method": page.map.method, "num_rows": len(page.map.samples)},
            "sources": sources,
        }
    )


def _map_size(config: Config) -> Any:
    """Return how large the map is, None for no map."""
    from distilclip.report.embedding_map import MapSize

    if not config.num_mapped:
        return None
    return MapSize(
        num_rows=config.num_mapped, method=config.map_method, thumbnail=config.thumbnail_size, seed=config.seed
    )
