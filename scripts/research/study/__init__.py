"""Which selection forgets least?"""
